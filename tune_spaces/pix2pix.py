"""pix2pix: how much of the truth (`l1`) is mixed into the adversarial loss.

Only the ratio `l1` : `adv` matters to Adam, so `adv` stays at 1.
"""

from tune_spaces import Objective, Range

SPACE = {
    "l1": Range(
        10.0,
        1000.0,
        "published 100; at 10 the result is sharp but strays from the truth, at 1000 it is the blurred mean",
    ),
}

OBJECTIVE = Objective(
    metric="kid",
    mode="min",
    directions="first",
    reason="L1 to the truth would always ask for more `l1`, hence for blur; the likeness to the target does not",
)
