from potstill.api import compose as compose, evaluate as evaluate, predict as predict, register as register, train as train  # fmt: skip # noqa: I001
