"""SGCD in verl: its linear cross-entropy on these kernels, and plug-ins for its registries (docs/verl.md).

from sgcd_kernels.integrations.verl import linear_cross_entropy      needs no verl
actor_rollout_ref.model.external_lib=sgcd_kernels.integrations.verl.register      registers engine and policy losses

    versions      which verl releases are supported
    lm_head       log-probs, entropy and divergence from hidden states, in place of a model's head
    alignment     which states of student and teacher predict the same tokens
    credit        token weights of a batch in verl's layout
    policy_loss   verl's own policy losses on weighted advantages
    engine        verl's FSDP engine, which also scores the teacher and passes the credit to the policy loss
    references    from a group's rollouts to the teacher's prompts
    settings      checks of a config, before a model is loaded
    trainer       verl's synchronous trainer, which also gets the references and adds the teacher's ids
"""

from sgcd_kernels.integrations.verl.linear_cross_entropy import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
