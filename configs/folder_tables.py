"""B against SA-2 on your own images, equal iterations and equal compute: docs/own_data.md.

--config.experiment.data.root=FOLDER --config.experiment.data.size=64
"""

from configs import folder
from configs.comparison import CONTROLLED, base_comparison, baseline, equal_compute, part, sa


def get_config():
    config = base_comparison()
    config.name = config.store = "folder"
    config.title = "The SA loss on the images of a folder"
    config.seeds = (0, 1, 2)
    config.experiment = folder.get_config("sn")
    config.trainings = {
        "b": baseline(),
        "sa": sa(),
        "b_equal": equal_compute(),
    }
    steps = config.experiment.sample.steps
    config.parts = {
        "main": part("Equal iterations", ("b", "sa"), (*CONTROLLED, "sn_ddpm"), steps),
        "compute": part("Equal compute", ("b_equal", "sa"), CONTROLLED, steps),
    }
    config.tables = ("main", "compute")
    config.gap.trainings = ()
    return config
