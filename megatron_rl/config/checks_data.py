"""Rules of the section ``data``."""

from __future__ import annotations

from typing import Callable

from megatron_rl.config.data import chosen_sources, parts_of
from megatron_rl.config.schema import Config
from megatron_rl.config.template import check_template
from megatron_rl.errors import UserError


def data_is_found(config: Config) -> None:
    """The data sets have a known form; a user's own sources and all settings are valid."""
    chosen_sources(config.data, "train")
    chosen_sources(config.data, "eval")


#: Arguments of transformers' apply_chat_template that are not the template's.
_NO_VARIABLES = frozenset(
    "conversation messages chat_template add_generation_prompt continue_final_message tokenize "
    "padding truncation max_length return_tensors return_dict return_assistant_tokens_mask "
    "tokenizer_kwargs".split()
)


def template_variables_are_free(config: Config) -> None:
    """``data.chat_template_kwargs`` sets only variables of the template, and there is a
    template.
    """
    data = config.data
    taken = next((name for name in data.chat_template_kwargs if name in _NO_VARIABLES), None)
    if taken is not None:
        raise UserError(
            f"data.chat_template_kwargs sets {taken}, which is given by the program; expected a "
            "variable of the template, such as enable_thinking; leave it out"
        )
    if data.chat_template_kwargs and data.chat in ("plain", "rendered"):
        raise UserError(
            f"data.chat_template_kwargs is given with data.chat {data.chat}, which uses no "
            "template; expected auto or template; set data.chat, or leave it out"
        )


def prompts_have_one_form(config: Config) -> None:
    """A prompt is a column or a template; a system message needs a chat template."""
    data = config.data
    if data.template is not None and data.prompt_key != "prompt":
        raise UserError(
            f"data.template is given beside data.prompt_key {data.prompt_key}; expected one of "
            "them: where the prompt is, or how it is made; leave one out"
        )
    parts = {**parts_of(data, "train"), **parts_of(data, "eval")}
    systems = {"data": data.system} | {field: part.system for field, part in parts.items()}
    for field, system in systems.items():
        if system is not None and data.chat in ("plain", "rendered"):
            raise UserError(
                f"{field}.system is given with data.chat {data.chat}, under which there are no "
                "messages; expected auto or template; set data.chat"
            )
    for field, template in {
        "data": data.template,
        **{f: p.template for f, p in parts.items()},
    }.items():
        if template is not None:
            check_template(template, f"{field}.template")


def prompts_can_be_shared(config: Config) -> None:
    """``data.share_prompts`` is not on where the model is to have Transformer Engine's attention.

    Where that depends on the machine, `models.build.shares_prompts` decides.
    """
    if config.data.share_prompts == "on" and config.model.transformer_engine:
        raise UserError(
            "data.share_prompts is on with model.transformer_engine true, whose attention cannot "
            "share prompts; expected auto or off; leave data.share_prompts out"
        )


PROMPT_RULES: tuple[Callable[[Config], None], ...] = (
    prompts_have_one_form,
    template_variables_are_free,
    prompts_can_be_shared,
)
