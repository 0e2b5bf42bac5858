from potstill.api import compose as compose, evaluate as evaluate, predict as predict, register as register, train as train, tune as tune  # fmt: skip # noqa: I001
