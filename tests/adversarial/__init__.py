"""Studies that invite a wrong link, and ordinary ones, with the truth known.

    python -m tests.adversarial [--each N] [--seed N]

prints what the matcher makes of them, kind by kind. Made from a seed: the same each time.
"""
