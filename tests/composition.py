"""Hydra's ``compose``, which computes the same here without what it does over and over: in a thirtieth of the time.

Replaced by name: where Hydra calls one of them otherwise, this fails.
"""

import copy
import functools
from pathlib import Path

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException
from omegaconf import base
from omegaconf.errors import OmegaConfBaseException

CONFIGS = Path(__file__).parents[1] / "configs"


@functools.cache
def hasten() -> None:
    """Read each file of ``configs/`` once, compose those that are chosen once, and set values in a copy of what that
    gave; parse an interpolation once."""
    load, read = ConfigLoaderImpl.load_configuration, ConfigRepository.load_config
    files = {}

    @functools.wraps(read)
    def read_once(repository, config_path):
        source = repository._find_object_source(config_path, ObjectType.CONFIG)
        if source is None or source.path != str(CONFIGS):
            return read(repository, config_path)
        if config_path not in files:
            files[config_path] = read(repository, config_path)
        return copy.deepcopy(files[config_path])

    parser = OverridesParser.create()
    parse = functools.cache(lambda override: parser.parse_overrides([override])[0])
    made = {}

    @functools.wraps(load)
    def load_once(loader, config_name, overrides, run_mode, from_shell=True, validate_sweep_overrides=True):
        sources = [source.path for source in loader.repository.get_sources()]
        if from_shell or str(CONFIGS) not in sources:
            return load(loader, config_name, overrides, run_mode, from_shell, validate_sweep_overrides)
        chosen = tuple(each for each in overrides if (CONFIGS / each.split("=")[0].lstrip("+~")).is_dir())
        values = [parse(each) for each in overrides if each not in chosen]
        loader.validate_sweep_overrides_legal(values, run_mode, from_shell)
        if (config_name, chosen) not in made:
            made[config_name, chosen] = load(loader, config_name, list(chosen), run_mode, from_shell)
        config = copy.deepcopy(made[config_name, chosen])
        try:
            loader._apply_overrides_to_config(values, config)
        except OmegaConfBaseException as error:
            raise ConfigCompositionException from error
        return config

    ConfigRepository.load_config = read_once
    ConfigLoaderImpl.load_configuration = load_once
    base.parse = functools.cache(base.parse)
