"""SGCD in verl: its linear cross-entropy by our kernels, and plug-ins for its registries (docs/verl.md).

from sgcd_kernels.integrations.verl import linear_cross_entropy      needs no verl
actor_rollout_ref.model.external_lib=sgcd_kernels.integrations.verl.register      registers engine and policy losses

    versions      which verl this fits
    lm_head       log-probs, entropy and divergence from hidden states, in place of a model's head
    alignment     which of the student's states answer which of the teacher's
    credit        token weights of a batch as verl holds it
    policy_loss   verl's own policy losses on weighted advantages
    engine        verl's FSDP engine, which scores the teacher and hands the credit to the policy loss
    references    from a group's rollouts to what the teacher reads
    settings      what a config must say, checked before a model is loaded
    trainer       verl's synchronous trainer, which asks for references and writes the teacher's ids
"""

from sgcd_kernels.integrations.verl.linear_cross_entropy import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
