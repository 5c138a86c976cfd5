"""mergekit's configurations, read as they are and turned into resolved jobs. Importing this imports no torch."""

from .config import Config
from .plan import make_tensor_plan
from .read import is_mergekit, load_config, parse_config

__all__ = ["Config", "is_mergekit", "load_config", "make_tensor_plan", "parse_config"]
