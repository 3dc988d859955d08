"""CycleGAN: how much the way back (`cycle`) and the target's own images (`identity`) hold the generators.

Only ratios to the adversarial term matter to Adam, so `adv` stays at 1 and two numbers are left. `adv_d` has an
optimiser of its own, which hides its scale.
"""

from tune_spaces import Objective, Range

SPACE = {
    "cycle": Range(
        1.0,
        30.0,
        "published 10; below about 1 the mapping forgets its input, above about 30 it stays close to doing nothing",
    ),
    "identity": Range(
        0.05,
        15.0,
        "published 5, half of cycle; it keeps colours where domains share them and holds back changes of shape; "
        "0.05 is as good as none (the authors use none for most of their tasks)",
    ),
}

OBJECTIVE = Objective(
    metric="kid",
    mode="min",
    directions="first",
    reason="unbiased at the few hundred images of a validation split, and unpaired, as the task is; of the first "
    "direction only, since the way back is often the harder one by far and would decide a mean alone",
)
