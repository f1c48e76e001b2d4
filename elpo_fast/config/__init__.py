"""The typed, strict configuration: its sections, and how one is loaded and compared."""

# ruff: noqa: F401

from elpo_fast.config.loading import (
    MECHANICS,
    ConfigError,
    differences,
    dump_config,
    flat,
    load_config,
    parse_config,
    parse_section,
    within,
)
from elpo_fast.config.sections import (
    ADVANTAGES,
    PLANNERS,
    WEIGHTS,
    AlgoConfig,
    BelConfig,
    ClipConfig,
    Config,
    EvalConfig,
    LoraConfig,
    McpConfig,
    ModelConfig,
    Positive,
    PositiveFloat,
    RolloutConfig,
    RunConfig,
    ScratchConfig,
    Section,
    SftConfig,
    SGLangConfig,
    Sizes,
    TaskConfig,
    ToolConfig,
    TrainConfig,
)
