"""Building blocks, initialisations, and the networks that two or more systems share."""
