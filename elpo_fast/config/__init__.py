"""The typed, strict configuration: its sections, and how one is loaded and compared."""

# ruff: noqa: F401

from elpo_fast.config.loading import (
    MECHANICS,
    ConfigError,
    check_run,
    differences,
    dump_config,
    flat,
    is_run,
    load_config,
    parse_config,
    parse_section,
    run_config,
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
