"""Claims as commands: train what is missing, or draw; tabulate, give a verdict."""

from analyses.studies.adaptability import ADAPTABILITY
from analyses.studies.bias import BIAS
from analyses.studies.decoupling import DECOUPLING
from analyses.studies.embeddings import EMBEDDINGS
from analyses.studies.homogeneous import HOMOGENEOUS
from analyses.studies.mamujoco import MAMUJOCO
from analyses.studies.mechanism import MECHANISM
from analyses.studies.scaling import SCALING
from analyses.studies.specialisation import SPECIALISATION
from analyses.studies.study import Simulation, Study, report_of, run_study
from analyses.studies.variance import VARIANCE
from gradlab.registry import Registry

STUDIES: Registry[Study | Simulation] = Registry(
    "study",
    {
        study.name: study
        for study in (
            SPECIALISATION,
            VARIANCE,
            DECOUPLING,
            ADAPTABILITY,
            EMBEDDINGS,
            HOMOGENEOUS,
            MAMUJOCO,
            MECHANISM,
            SCALING,
            BIAS,
        )
    },
)

__all__ = ["STUDIES", "Simulation", "Study", "report_of", "run_study"]
