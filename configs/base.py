"""All keys of an experiment, with the hosts' defaults, their meaning and what they may be.

An experiment's file takes ``base_config()`` and sets the keys that differ. The dictionary is
locked: a key that is not listed here is refused. Values are numbers and strings;
adapters/hosts.py and third_party/common resolve names.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.keys import Key, Keys, defaults, key, seed

PROCESSES = "adapters.hosts:PROCESSES"
PRECISIONS = "third_party.common.step_options:PRECISIONS"


def training_keys() -> dict[str, Key]:
    """The keys of a training: of the noise network, or of a head."""
    return {
        "init_from": key(
            "",
            "start from this checkpoint, in any layout of docs/checkpoints.md; empty: random "
            "weights. With iterations = 0 it is used without training",
        ),
        "iterations": key(500_000, "training steps", at_least=0),
        "batch_size": key(128, "images a training step", at_least=1),
        "lr": key(1e-4, "learning rate", above=0),
        "stratified": key(
            False, "draw one step from each of B equal parts of 1..N; False: independent (hosts)"
        ),
        "lr_warmup": key(0, "steps over which the rate rises linearly to lr", at_least=0),
        "lr_decay": key(0, "last steps, over which the rate falls linearly to 0", at_least=0),
        "ema": key(0.9999, "rate of the average of the weights", at_least=0, below=1),
        "grad_clip": key(0.0, "largest norm of the gradient; 0: no limit", at_least=0),
        "log_every": key(100, "steps between lines of the log", at_least=1),
        "ckpt_every": key(10_000, "steps between checkpoints", at_least=1),
        "keep": key(0, "newest checkpoints kept; 0: all", at_least=0),
        "channels_last": key(False, "memory layout of the network (docs/training.md)"),
        "compile": key(False, "compile the network (docs/training.md)"),
        "precision": key("float32", "of the network's matrix products", one_of=PRECISIONS),
        "accumulate": key(1, "parts into which a process splits its batch", at_least=1),
    }


KEYS: Keys = {
    "name": key("", "name of the experiment; its runs are in runs/NAME/", filled=True),
    "seed": seed(1234, "for weights, data order and noise in training"),
    "baseline": key(False, "also run the baseline, sa.lam = 0, and print B against SA"),
    "data": {
        "name": key("", "the data set", one_of="third_party.common.datasets:DATASETS"),
        "root": key("data", "folder of the data sets; of the images, if name is folder or npz"),
        "split": key("", 'part of the data set, such as "train"; empty: its default'),
        "size": key(
            0,
            "of a folder's images: side in pixels of the squares to which they are cropped and "
            "resized; 0: as they are, and all must be equally large",
            at_least=0,
        ),
        "channels": key(
            3,
            "of a folder's images: 3: all are read as RGB; 1: as grey; 0: as found, all grey or "
            "all in colour",
            at_least=0,
            at_most=3,
        ),
        "follow_links": key(False, "also read what links lead to outside a folder"),
        "flip": key(False, "mirror half of the images of each training step, left to right"),
        "crop": key(
            False,
            "of a folder's images in training: a square at a random place of the longer side, not "
            "the middle one",
        ),
        "labels": key(
            False,
            "train and sample by class; of a folder's images, each sub-folder of the root is a "
            "class",
        ),
        "check_md5": key(True, "compare archives with their published checksums"),
    },
    "schedule": {
        "name": key("linear", "the noise schedule", one_of="third_party.common.schedule:BETAS"),
        "N": key(1000, "number of steps of the forward process", at_least=1),
    },
    "network": {
        "name": key("", "kind of network", one_of="third_party.common.nets.by_name:NETWORKS"),
        "args": key({}, "its arguments, which the network checks", free=True),
    },
    "time": {
        "rescale_timesteps": key(True, "the network gets steps of 1..1000 for any N"),
        "shift1": key(False, "the network counts steps from 0"),
    },
    # The SA loss: see sa_plugin.loss.SALoss.
    "sa": {
        "lam": key(1.0, "lambda, the weight of the SA term; 0: the baseline", at_least=0),
        "lam_warmup": key(0, "steps over which lambda rises linearly to lam", at_least=0),
        "K": key(2, "steps in a window", at_least=1),
        "weighting": key("uniform", "the weights tau", one_of="sa_plugin.tau:WEIGHTINGS"),
        "window": key("down", "which steps are in a window", one_of="sa_plugin.window:WINDOWS"),
        "noise": key("independent", "the noise in a window", one_of="sa_plugin.noise:NOISES"),
        "backprop": key("all", "calls with a gradient", one_of="sa_plugin.window:BACKPROPS"),
        "stack": key(True, "make the calls of a window in one batch"),
        "reuse": key(False, "L_simple from all steps of a window; with backprop all"),
        "extra_precision": key(
            "same", "of calls without a gradient; with backprop one", one_of=("same", "bf16")
        ),
    },
    "base": {  # the noise network
        **training_keys(),
        "label_drop": key(
            0.0,
            "share of the labels that are replaced by the null class; guidance needs it",
            at_least=0,
            below=1,
        ),
        "input_perturbation": key(
            0.0,
            "gamma: the network gets x_n made with eps + gamma xi and predicts eps; 0: the hosts' "
            "(arXiv 2301.11706)",
            at_least=0,
        ),
    },
    "head": {
        "training": key(
            "pretrained",
            "pretrained: a head on the frozen noise network. joint: one network with twice the "
            "output channels, trained in the base stage",
            one_of=("pretrained", "joint"),
        ),
        "mode": key("simple", "layers of a head", one_of="third_party.common.nets.common:MODES"),
        "ratio": key(1.0, "weight of the second output's loss", at_least=0),
        **training_keys(),
    },
    # Analytic-DPM's Gamma_n = E mean(eps_pred^2): see sa_plugin.sampling.gamma.
    "gamma": {
        "n_images": key(10_000, "images chosen at random; all if there are fewer", at_least=2),
        "noises": key(1, "noises for each image and step", at_least=1),
        "batch_size": key(500, "images a call of the network", at_least=1),
        "seed": seed(0, "for the choice of images, and for noise"),
    },
    "sample": {
        "n_images": key(50_000, "images a cell", at_least=1),
        "batch_size": key(500, "images a call of the network", at_least=1),
        "seed": seed(0, "for initial noise and sampling"),
        "processes": key(
            (),
            "reverse processes, the rows of the tables",
            one_of=PROCESSES,
            filled=True,
            distinct=True,
        ),
        "steps": key(
            (10, 25, 50, 100, 200, 1000),
            "numbers of steps, the columns of the tables",
            at_least=1,
            filled=True,
            distinct=True,
        ),
        "trajectory": key(
            "linear",
            "how the steps are chosen; quad_ddim moves steps that repeat up by one, quad_ddim_host "
            "repeats them, as the codes of DDIM and Analytic-DPM do",
            one_of="sa_plugin.sampling.trajectory:TRAJECTORIES",
        ),
        "classes": key(
            "data",
            "the images' classes: data: as often as there; even: in turn; or the name of one",
        ),
        "guidance": key(0.0, "w in (1 + w) eps(x, n, class) - w eps(x, n, null class)", at_least=0),
        "clip_x0": key(True, "clip the predicted x_0 to [-1, 1]"),
        "avg_cov": key(False, "average optimal variances over an image's values; not in Lanczos-"),
        "probes": key(1, "random signs a step of Probes-; each costs a derivative", at_least=1),
        "lanczos_steps": key(3, "of each step of Lanczos-; each costs a derivative", at_least=1),
        "clip_sigma_idx": key(
            1,
            "the optimal variances' noise is clipped up to this step (arXiv 2201.06503, app. D)",
            at_least=0,
        ),
        "clip_pixel_ddpm": key(2.0, "to this many of 255 grey levels, with DDPM", at_least=0),
        "clip_pixel_ddim": key(1.0, "the same with DDIM", at_least=0),
        "channels_last": key(False, "memory layout of the network (docs/sampling.md)"),
        "compile": key(False, "compile the network (docs/sampling.md)"),
        "precision": key("float32", "of the network's matrix products", one_of=PRECISIONS),
    },
    "evaluate": {
        "features": key(
            ("inception", "inception_tf"),
            "feature spaces: FID uses inception; the Inception Score uses inception_tf",
            one_of="adapters.measuring.features:EXTRACTORS",
            filled=True,
            distinct=True,
        ),
        "reference": key(
            "", "the images that metrics compare with: a split of the data; empty: training images"
        ),
        "splits": key(10, "in the formula of the Inception Score", at_least=1),
    },
}


def base_config() -> ConfigDict:
    """The hosts' published defaults, without the names of network and data."""
    return defaults(KEYS)
