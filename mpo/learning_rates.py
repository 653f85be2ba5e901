"""MM1's rule for the learning rate: from the size of the model, as a pure function.

Source: McKinzie et al. 2024, "MM1", https://arxiv.org/abs/2403.09611, section 3.3.
"""

import math
from typing import Any, NamedTuple

from torch import nn

from data_builders.records import InputError, Row
from mpo.models import part_of, size_of_parameter


class Rates(NamedTuple):
    """What the rule gives."""

    learning_rate: float
    weight_decay: float


def mm1_rates(num_parameters: float) -> Rates:
    """The peak learning rate eta(N) = exp(-0.4214 ln N - 0.5535), and a weight decay of 0.1 eta.

    MM1 found the rate by a grid search on models of 9M to 1.2B parameters. Torch's AdamW multiplies weight decay with
    the learning rate, so that a number in proportion to it hardly does anything there; if the paper's is taken off
    weights as it is, torch's 0.1 comes to the same: `weight_decay: 0.1` beside the rule does that.

    Args:
        num_parameters: N, of the language model without its embeddings.

    Raises:
        InputError: It is not positive.

    >>> [f"{mm1_rates(n).learning_rate:.2e}" for n in (1.2e9, 3e9, 7e9, 30e9)]
    ['8.58e-05', '5.83e-05', '4.08e-05', '2.21e-05']
    """
    if num_parameters <= 0:
        raise InputError(f"`lr`: MM1's rule needs the number of parameters, got {num_parameters}.")
    learning_rate = math.exp(-0.4214 * math.log(num_parameters) - 0.5535)
    return Rates(learning_rate, 0.1 * learning_rate)


def rates_of(rule: Row, model: nn.Module) -> Rates:
    """What the setting `lr` means for a model.

    Args:
        rule: `{rule: mm1}`, with `parameters` where N is not to be counted.
        model: Of which N is counted: the language model without embeddings and output layer.

    Raises:
        InputError: There is no such rule, or a key is unknown.
    """
    if rule.get("rule") != "mm1" or rule.keys() - {"rule", "parameters"}:
        raise InputError(
            f"`lr` is {rule}: it takes `{{rule: mm1}}`, and `parameters` where they are not to be counted."
        )
    given = rule.get("parameters")
    return mm1_rates(_num_parameters(model) if given is None else _number(given))


def _num_parameters(model: nn.Module) -> int:
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    left_out = {id(parameter) for end in ends if end is not None for parameter in end.parameters()}
    return sum(
        size_of_parameter(parameter)
        for name, parameter in model.named_parameters()
        if part_of(name) == "llm" and id(parameter) not in left_out
    )


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"`lr` has `parameters: {value!r}`: it must be a number, such as 3.0e+9.")
    return float(value)
