"""Which model answers: the settings that every verb that asks a model shares, and the sampler that they name."""

from dataclasses import dataclass, field
from pathlib import Path

from data_builders.records import InputError, Row
from data_builders.samplers import Sampler, SamplingSettings


@dataclass(kw_only=True)
class SamplerConfig:
    """Which model answers, where it runs, and how tokens are drawn."""

    model: str = field(metadata={"help": "Model folder or Hub name; with `server`, the name that it is served under."})
    server: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Addresses of OpenAI-compatible servers (http://host:8000/v1), which share the work; without any "
            "the model runs in this process."
        },
    )
    image_root: str = field(default=".", metadata={"help": "Folder that image paths are relative to."})
    temperature: float = field(default=1.0, metadata={"help": "0 is greedy (paper: 1.0)."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling; 1 keeps every token."})
    top_k: int = field(default=0, metadata={"help": "Keeps the k likeliest tokens; 0 keeps every token."})
    max_new_tokens: int = field(default=4096, metadata={"help": "Longer responses are cut and marked `length`."})
    seed: int = field(default=0, metadata={"help": "Same seed, same responses; a server may not keep to it."})
    batch_size: int = field(default=64, metadata={"help": "In process: sequences generated at a time."})
    device: str | None = field(
        default=None, metadata={"help": "In process: where the model runs; null takes a GPU if there is one."}
    )
    dtype: str = field(default="auto", metadata={"help": "In process: weights in this type; auto takes the model's."})
    concurrency: int = field(default=64, metadata={"help": "Server: requests that each one works on at a time."})
    timeout: float = field(default=600.0, metadata={"help": "Server: seconds that a request may take."})
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Server: folder or Hub name of the model's tokenizer, to cut and continue responses by."},
    )
    api_key_env: str = field(
        default="OPENAI_API_KEY",
        metadata={"help": "Server: environment variable that holds the key, if it needs one."},
    )

    def drawing(self) -> SamplingSettings:
        """How tokens are drawn.

        Raises:
            InputError: A setting is out of its range.
        """
        return SamplingSettings(self.temperature, self.top_p, self.top_k, self.max_new_tokens, self.seed)

    def provenance(self) -> Row:
        """What the answers depend on."""
        served = {"server": "openai"} if self.server else {"dtype": self.dtype}
        return {"model": self.model, **served, **self.drawing().provenance()}

    def model_paths(self) -> list[Path]:
        """The folder whose content the answers depend on, if the model is one."""
        return [] if self.server or not Path(self.model).is_dir() else [Path(self.model)]


def check_sampler(config: SamplerConfig) -> None:
    """Looks, before any work, whether the model or a server is there; weights are not loaded.

    Raises:
        InputError: It is not, or a setting is out of its range.
    """
    config.drawing()
    if config.server:
        open_sampler(config)
    else:
        from data_builders.hf_sampler import load_processor

        load_processor(config.model)


def open_sampler(config: SamplerConfig) -> Sampler:
    """The sampler that the settings name; loads the model, or asks the servers whether they are there.

    Raises:
        InputError: There is no such model or server, or a setting is out of its range.
    """
    if config.server:
        from data_builders.server_sampler import ServerSampler

        return ServerSampler(
            config.model,
            config.server,
            image_root=Path(config.image_root),
            concurrency=config.concurrency,
            timeout=config.timeout,
            tokenizer=config.tokenizer,
            api_key_env=config.api_key_env,
        )
    if config.batch_size < 1:
        raise InputError(f"`batch_size` must be at least 1, got {config.batch_size}.")
    from data_builders.hf_sampler import HFSampler

    return HFSampler(
        config.model,
        image_root=Path(config.image_root),
        batch_size=config.batch_size,
        device=config.device,
        dtype=config.dtype,
    )
