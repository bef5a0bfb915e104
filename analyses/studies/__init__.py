"""Claims of the literature as commands: train what is missing, tabulate, give a verdict."""

from analyses.studies.specialisation import SPECIALISATION
from analyses.studies.study import Study, run_study
from gradlab.registry import Registry

STUDIES: Registry[Study] = Registry("study", {SPECIALISATION.name: SPECIALISATION})

__all__ = ["STUDIES", "Study", "run_study"]
