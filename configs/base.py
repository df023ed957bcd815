"""Every key that an experiment has, with its meaning and the hosts' defaults.

An experiment's file takes ``base_config()`` and sets what differs. The dictionary is locked: a key
that does not stand here is refused. Numbers and strings only; names resolve in
adapters/registry.py.
"""

from __future__ import annotations

from ml_collections import ConfigDict


def base_config() -> ConfigDict:
    """The hosts' published defaults, for networks and data still to be named."""
    config = ConfigDict(
        {
            "name": "",  # of the experiment: its runs lie in runs/NAME/
            "seed": 1234,  # of weights, data order and noise in training
            "data": {"name": "", "root": "data", "check_md5": True},
            "schedule": {"name": "linear", "N": 1000},
            # The network's kind, and its arguments (checked by the network itself).
            "network": {"name": "", "args": {}},
            "time": {"rescale_timesteps": True, "shift1": False},
            # The SA loss; lam = 0 is the baseline. See sa_plugin.loss.SALoss.
            "sa": {
                "lam": 1.0,
                "lam_warmup": 0,  # iterations over which lambda rises to lam, a straight line
                "K": 2,
                "weighting": "uniform",
                "window": "down",
                "noise": "independent",
                "backprop": "all",
                "stack": True,
                "reuse": False,  # L_simple from all calls of a window; with backprop "all"
                "extra_precision": "same",  # or "bf16": calls without a graph, backprop "one"
            },
            "base": _training(),  # the noise network
            "head": {
                # "pretrained": a head on the frozen noise network. "joint": one network with twice
                # the output channels, trained in the base stage; the head stage is left out.
                "training": "pretrained",
                "mode": "simple",  # or "complex"
                "ratio": 1.0,  # weight of the second prediction's loss
                **_training(),
            },
            # Analytic-DPM's Gamma_n = E mean(eps_pred^2); see sa_plugin.gamma. Images are taken at
            # random, all of them if there are fewer. Each passes all N steps.
            "gamma": {"n_images": 10_000, "noises": 1, "batch_size": 500, "seed": 0},
            "sample": {
                "n_images": 50_000,
                "batch_size": 500,
                "seed": 0,
                "processes": (),  # rows of the tables; see adapters.registry.PROCESSES
                "steps": (10, 25, 50, 100, 200, 1000),
                "trajectory": "linear",
                "clip_x0": True,
                "avg_cov": False,
                # The optimal variances' noise is clipped up to this step (arXiv 2201.06503, app. D)
                "clip_sigma_idx": 1,
                "clip_pixel_ddpm": 2.0,
                "clip_pixel_ddim": 1.0,
                # How the network is run; see docs/sampling.md. Another choice, other last bits.
                "channels_last": False,
                "compile": False,
                "precision": "float32",  # or "bf16", "fp16": of the network's matrix products
            },
            "evaluate": {
                # See adapters.features.EXTRACTORS: FID is of "inception", the Inception Score of
                # "inception_tf", a second pass.
                "features": ("inception", "inception_tf"),
                "splits": 10,  # of the Inception-Score formula
            },
        }
    )
    return config.lock()


def _training() -> dict:
    return {
        # Start from these weights: a checkpoint in any layout of docs/checkpoints.md; "": random.
        # With iterations = 0 they are taken as they are.
        "init_from": "",
        "iterations": 500_000,
        "batch_size": 128,
        "lr": 1e-4,
        "stratified": False,  # one step n from each of B parts of 1..N; the hosts': independent
        "lr_warmup": 0,  # steps over which the rate rises to lr, a straight line; 0: none
        "ema": 0.9999,
        "grad_clip": 0.0,  # largest norm of the gradient; 0: no limit
        "log_every": 100,
        "ckpt_every": 10_000,
        "keep": 0,  # checkpoints kept; 0: all
        # How a step is computed; see third_party.common.step_options and docs/training.md.
        "channels_last": False,
        "compile": False,
        "precision": "float32",  # or "bf16", "fp16"
        "accumulate": 1,  # parts that a process cuts its batch into
    }
