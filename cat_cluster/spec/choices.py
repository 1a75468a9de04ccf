"""The names that more than one room chooses from, each list once; `typing.get_args` makes a tuple of one."""

from __future__ import annotations

from typing import Literal

MethodName = Literal["cat", "lora"]
SamplerName = Literal[
    "ddim",
    "euler",
    "euler_karras",
    "euler_ancestral",
    "dpmpp_2m",
    "dpmpp_2m_karras",
    "dpmpp_2m_sde",
    "dpmpp_2m_sde_karras",
    "lcm",
]
Weighting = Literal["none", "a1111"]
Targets = Literal["attention", "cross_attention", "attention_ff"]
ServedTargets = Literal[Targets, "all"]
Blocks = Literal["all", "mid_up", "up"]
BlockGroup = Literal["down", "mid", "up"]
PriorPrompt = Literal["token_removed", "class_noun", "empty", "mixture"]
AlphaSchedule = Literal["constant", "high_noise", "low_noise"]
OptimizerName = Literal["adamw", "adafactor", "prodigy"]
LearningRateSchedule = Literal["constant", "linear", "cosine"]
Precision = Literal["fp32", "bf16"]
AdapterFormat = Literal["diffusers", "peft", "kohya"]

MetricName = Literal[
    "kps",
    "kps_all_pairs",
    "identity_similarity",
    "identity_gain",
    "prompt_similarity",
    "base_drift",
    "fisher_drift",
    "diversity_ratio",
]

RevisionStatus = Literal["published", "rejected"]
Outcome = Literal["published", "already published", "rejected", "failed"]
AdapterPhase = Literal["waiting", "training", "evaluating", Outcome]

DriftScore = Literal["kps", "identity", "base_drift"]
ProbeScore = Literal[DriftScore, "decoy_drift"]
DriftDetector = Literal["ewma", "cusum"]
DriftState = Literal["ok", "warning", "alarm"]
ProbeVerdict = Literal[DriftState, "error"]
DriftPolicy = Literal["annotate", "fallback", "quarantine"]

JobLog = Literal["driver", "head", "workers"]
