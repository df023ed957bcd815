"""Fashion-MNIST, three seeds: SA-2, its rivals, the shift, a solver; 5.7 core-hours.

1.3M parameters and 128,000 training images, two epochs, are what two cores carry; the networks
compute in bf16, and the part "precision" samples in float32 beside it. configs/fashion.py is an
experiment for a GPU. Interrupted, the command goes on where it stopped.
"""

from configs import fashion
from configs.comparison import (
    CONTROLLED,
    base_comparison,
    baseline,
    part,
    price_of_b,
    sa,
    sampling,
    training,
)


def get_experiment():
    """The experiment of configs/fashion.py with a network and a training for a CPU."""
    experiment = fashion.get_config("sn")
    experiment.network.args.update(
        model_channels=16,
        num_res_blocks=1,
        attention_resolutions=(),
        dropout=0.0,
        channel_mult=(1, 1, 2, 6),
        num_heads=1,
        num_groups=8,
    )
    for stage in (experiment.base, experiment.head):
        stage.update(batch_size=32, lr=1e-3, ckpt_every=500, precision="bf16")
    experiment.base.update(iterations=4000, lr_decay=2000, ema=0.997)
    experiment.head.update(iterations=1000, ema=0.99)
    experiment.sample.update(n_images=2000, batch_size=250, precision="bf16")
    experiment.evaluate.update(features=("fashion_classifier", "pixels"), reference="test")
    return experiment


def get_config():
    config = base_comparison()
    config.name = config.store = "fashion"
    config.title = "The SA loss, its rivals and its closed form on Fashion-MNIST"
    config.seeds = (0, 1, 2)
    config.experiment = get_experiment()
    perturbed = {"input_perturbation": 0.1}
    config.trainings = {
        "b": baseline(),
        "sa": sa(),
        "sa_price": price_of_b(),
        "perturbed": training("{loss}, input perturbation 0.1", sa={"lam": 0.0}, base=perturbed),
    }
    config.samplings = {
        "default": sampling(""),
        "shifted": sampling("shifted q 1/3", correction="shifted", q=1 / 3),
        "shifted_best": sampling("shifted best q", correction="shifted"),
        "float32": sampling("float32", precision="float32"),
    }
    trained = tuple(config.trainings)
    shifts = ("b", "b/shifted", "b/shifted_best")
    few = (5, 10, 25)
    config.parts = {
        "main": part("Trainings", trained, CONTROLLED, few),
        "sampling": part("At sampling time", (*shifts, "sa"), CONTROLLED, few),
        "solver": part("A fast solver", ("b", "sa", "b/shifted"), ("dpm_solver",), few),
        "optimal": part("With the optimal variances", ("b", "sa"), ("npr_ddpm", "sn_ddpm"), few),
        "many": part("Many steps", ("b", "sa", "b/shifted"), CONTROLLED, (50,)),
        "precision": part("bf16 and float32", ("b", "b/float32"), CONTROLLED, (10,)),
    }
    config.tables = tuple(config.parts)
    return config
