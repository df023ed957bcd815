"""What SA does, and what does the same without training: digits, five seeds.

SA-2 with lambda 3 and SA-4 with lambda 1 have the same strength q = lambda (K-1)/(K+lambda), 0.6.
"Price of B" is SA-2 with ``reuse`` and half the images a step: as many network calls as B.
"Fine-tuned" starts from B and has a fifth of its iterations: B with 1.4 times as many costs as
much where K is 2.
The corrections are those of sa_plugin.effect. See docs/why_sa_works.md.
"""

from configs import digits_tables
from configs.comparison import CONTROLLED, baseline, part, price_of_b, sa, sampling, training

OPTIMAL = ("analytic_ddpm", "npr_ddpm", "sn_ddpm", "analytic_ddim", "npr_ddim", "sn_ddim")


def get_config():
    config = digits_tables.five_seeds("digits_effect", "What the SA loss does, on digits")
    config.trainings = {
        "b": baseline(),
        "sa": sa(),
        "sa_price": price_of_b(),
        "sa_tuned": training("{loss}, fine-tuned from B", init="b", times={"iterations": 1 / 5}),
        "b_1400": training(
            "{loss}, 1.4 times the iterations", times={"iterations": 1.4}, sa={"lam": 0.0}
        ),
        "sa_3": sa(2, 3.0),
        "sa4": sa(4, 1.0),
        "sa_02": sa(2, 0.2),
        "sa3_03": sa(3, 0.3),
        "sa4_02": sa(4, 0.2),
        "shared": sa(noise="shared"),
        "chain": sa(noise="chain"),
        "theorem1": sa(weighting="theorem1"),
        "relative": sa(weighting="relative"),
    }
    config.samplings = {
        "default": sampling(""),
        "spectral": sampling("spectral q 1/3", correction="spectral", q=1 / 3),
        "shifted": sampling("shifted q 1/3", correction="shifted", q=1 / 3),
        "spectral_best": sampling("spectral best q", correction="spectral"),
        "shifted_best": sampling("shifted best q", correction="shifted"),
        "scaled": sampling("epsilon scaling, fitted constant", eps_scale=0.0),
        "norms": sampling("eps scaled by step", correction="norms"),
    }
    steps = (5, 10, 25, 50, 100)
    corrected = tuple(f"b/{name}" for name in config.samplings if name != "default")
    config.samplings.update(
        unclipped=sampling("x_0 not clipped", clip_x0=False),
        shifted_unclipped=sampling(
            "shifted q 1/3, x_0 not clipped", correction="shifted", q=1 / 3, clip_x0=False
        ),
    )
    unclipped = ("b/unclipped", "sa/unclipped", "b/shifted_unclipped")
    few = ("b", "sa", "b/shifted", "b/shifted_best")
    cheap = ("b", "sa", "sa_price", "sa_tuned", "b_1400")
    forms = ("b", "sa", "sa_3", "sa4", "sa_02", "sa3_03", "sa4_02")
    forms += ("shared", "chain", "theorem1", "relative")
    config.parts = {
        "sampling": part("At sampling time", ("b", "sa", *corrected), CONTROLLED, steps),
        "price": part("What SA costs", cheap, CONTROLLED, steps),
        # The closed form is for a sampler that does not clip.
        "unclipped": part("x_0 not clipped", unclipped, CONTROLLED, steps[:-1]),
        "forms": part("Forms of the loss", forms, CONTROLLED, steps),
        "optimal": part("With the optimal variances", few, OPTIMAL, (5, 10, 25)),
    }
    config.tables = ("sampling", "price", "unclipped", "forms", "optimal")
    return config
