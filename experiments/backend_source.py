"""``attention=NAME`` for the backends of installed packages: Hydra asks here for what configs/ does not have."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from dashattn.backends import BACKENDS

_GROUP, _SCHEMA = "attention", "_schema"
_SCHEME = "dashattn"


class BackendSource(ConfigSource):
    """The dataclass of a backend as ``attention/NAME``, and as ``attention/NAME_schema`` for files of values."""

    @staticmethod
    def scheme() -> str:
        return _SCHEME

    def load_config(self, config_path: str) -> ConfigResult:
        try:
            config, _ = BACKENDS[_backend(config_path)]
        except ValueError as error:
            raise ConfigCompositionException(str(error)) from error
        header = {"package": None}
        return ConfigResult(self.provider, self.full_path(), OmegaConf.structured(config), header)

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return config_path.strip("/") == _GROUP

    def is_config(self, config_path: str) -> bool:
        name = _backend(config_path)
        return name is not None and not BACKENDS.is_ours(name) and name in _plugins()

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return sorted(_plugins()) if self.is_group(config_path) and results_filter != ObjectType.GROUP else []


class _SearchPath(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append(provider=_SCHEME, path=f"{_SCHEME}://")


def register_plugins() -> None:
    """Let Hydra find them; a second call changes nothing."""
    for kind in (BackendSource, _SearchPath):
        Plugins.instance().register(kind)


def _backend(config_path: str) -> str | None:
    """The name of a backend that a path of Hydra's stands for."""
    group, _, name = config_path.partition("/")
    return name.removesuffix(".yaml").removesuffix(_SCHEMA) if group == _GROUP and name else None


def _plugins() -> dict:
    try:
        return BACKENDS.plugins()
    except ValueError as error:
        raise ConfigCompositionException(str(error)) from error
