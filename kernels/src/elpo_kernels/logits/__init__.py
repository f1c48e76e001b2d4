"""Log-prob and policy loss from logits that exist already: `ops` the operators, `functions` what is
called."""

from elpo_kernels.logits.functions import logits_policy_loss, logprob_from_logits

__all__ = ["logits_policy_loss", "logprob_from_logits"]
