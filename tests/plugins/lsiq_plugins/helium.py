"""A model family: Helium, whose blocks are laid out as LLaMA's."""

from dataclasses import replace

from lsiq.models.families.llama import LLAMA

HELIUM = replace(LLAMA, model_type="helium")
