"""Claims as commands: train what is missing, or draw; tabulate, give a verdict."""

from analyses.studies.bias import BIAS
from analyses.studies.games import GAMES_STUDY
from analyses.studies.specialisation import SPECIALISATION
from analyses.studies.study import Simulation, Study, run_study
from gradlab.registry import Registry

STUDIES: Registry[Study | Simulation] = Registry(
    "study", {study.name: study for study in (SPECIALISATION, GAMES_STUDY, BIAS)}
)

__all__ = ["STUDIES", "Simulation", "Study", "run_study"]
