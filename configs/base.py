"""All keys of an experiment, with their meaning and the hosts' defaults.

An experiment's file takes ``base_config()`` and sets the keys that differ. The dictionary is
locked: a key that is not listed here is refused. Values are numbers and strings;
adapters/hosts.py and third_party/common resolve names.
"""

from __future__ import annotations

from ml_collections import ConfigDict


def base_config() -> ConfigDict:
    """The hosts' published defaults, without the names of network and data."""
    config = ConfigDict(
        {
            "name": "",  # of the experiment; its runs are in runs/NAME/
            "seed": 1234,  # for weights, data order and noise in training
            "data": {"name": "", "root": "data", "check_md5": True},
            "schedule": {"name": "linear", "N": 1000},
            # The kind of network and its arguments (which the network checks).
            "network": {"name": "", "args": {}},
            "time": {"rescale_timesteps": True, "shift1": False},
            # The SA loss; lam = 0 is the baseline. See sa_plugin.loss.SALoss.
            "sa": {
                "lam": 1.0,
                "lam_warmup": 0,  # iterations over which lambda rises linearly to lam
                "K": 2,
                "weighting": "uniform",
                "window": "down",
                "noise": "independent",
                "backprop": "all",
                "stack": True,
                "reuse": False,  # L_simple from all rows of a window; with backprop "all"
                "extra_precision": "same",  # or "bf16": calls without a graph, backprop "one"
            },
            "base": _training(),  # the noise network
            "head": {
                # "pretrained": a head on the frozen noise network. "joint": one network with twice
                # the output channels, trained in the base stage, without a head stage.
                "training": "pretrained",
                "mode": "simple",  # or "complex"
                "ratio": 1.0,  # weight of the second output's loss
                **_training(),
            },
            # Analytic-DPM's Gamma_n = E mean(eps_pred^2); see sa_plugin.sampling.gamma. n_images
            # images are chosen at random, or all if there are fewer. Each passes all N steps.
            "gamma": {"n_images": 10_000, "noises": 1, "batch_size": 500, "seed": 0},
            "sample": {
                "n_images": 50_000,
                "batch_size": 500,
                "seed": 0,
                "processes": (),  # rows of the tables; see adapters.hosts.PROCESSES
                "steps": (10, 25, 50, 100, 200, 1000),
                "trajectory": "linear",
                "clip_x0": True,
                "avg_cov": False,
                # The optimal variances' noise is clipped up to this step (arXiv 2201.06503, app. D)
                "clip_sigma_idx": 1,
                "clip_pixel_ddpm": 2.0,
                "clip_pixel_ddim": 1.0,
                # How the network runs; see docs/sampling.md. Each choice changes the last bits.
                "channels_last": False,
                "compile": False,
                "precision": "float32",  # or "bf16", "fp16", for the network's matrix products
            },
            "evaluate": {
                # See adapters.measuring.features.EXTRACTORS: FID uses "inception"; the Inception
                # Score uses "inception_tf", a second pass.
                "features": ("inception", "inception_tf"),
                "splits": 10,  # in the formula of the Inception Score
            },
        }
    )
    return config.lock()


def _training() -> dict:
    return {
        # Start from these weights: a checkpoint in any layout of docs/checkpoints.md; "": random.
        # With iterations = 0 they are used without training.
        "init_from": "",
        "iterations": 500_000,
        "batch_size": 128,
        "lr": 1e-4,
        "stratified": False,  # one step from each of B parts of 1..N; False: independent (hosts)
        "lr_warmup": 0,  # steps over which the rate rises linearly to lr; 0: none
        "ema": 0.9999,
        "grad_clip": 0.0,  # largest norm of the gradient; 0: no limit
        "log_every": 100,
        "ckpt_every": 10_000,
        "keep": 0,  # checkpoints kept; 0: all
        # How a step is computed; see third_party.common.step_options and docs/training.md.
        "channels_last": False,
        "compile": False,
        "precision": "float32",  # or "bf16", "fp16"
        "accumulate": 1,  # parts into which a process splits its batch
    }
