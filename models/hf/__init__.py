"""Hugging Face checkpoints: folders of config.json and safetensors, read into a ``Transformer``'s weights and written.

Nothing else is read: no pickle, no code. What this project's model does not compute is refused, not approximated. The
architectures are the rows of ``models.hf.families``.
"""

from models.hf.attention import check_same_attention, is_sparse, read_attention, read_step
from models.hf.config import check_continues, check_same_model, is_hf_folder, read_config
from models.hf.export import write_folder
from models.hf.weights import check_files, read_tensors, read_weights, weight_files

__all__ = [
    "check_continues",
    "check_files",
    "check_same_attention",
    "check_same_model",
    "is_hf_folder",
    "is_sparse",
    "read_attention",
    "read_config",
    "read_step",
    "read_tensors",
    "read_weights",
    "weight_files",
    "write_folder",
]
