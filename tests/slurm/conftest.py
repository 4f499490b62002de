from tests.experiments.conftest import cache_dir, make_config, tiny_overrides  # noqa: F401
