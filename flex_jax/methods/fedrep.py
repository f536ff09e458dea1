"""FedRep on LoRA (Collins et al. 2021, arXiv 2102.07078): FedPer's cut, trained in two phases.

A client first trains its upper layers on top of the lower ones that it downloaded, then the lower ones. Only the lower
ones are sent. The personal part is FedPer's, not the classifier alone; local steps are AdamW's instead of SGD's. The
released code fine-tunes all heads once more after the last round. That is left out: every method is evaluated after the
same steps.
"""

from flex_jax.checks import Count, Fraction
from flex_jax.federated.method import ClientContext, ClientRule, Method
from flex_jax.methods._phases import count_personal_steps, personal_first
from flex_jax.methods.fedper import fedper


def fedrep(personal_layers: Count = 1, personal_steps: Fraction = 0.5) -> Method:
    """Trains the personal layers for a fraction `personal_steps` of a round (the paper's tau), then the shared ones."""

    def optimizer(context: ClientContext, clip, adamw):
        return personal_first(count_personal_steps(personal_steps, context.num_steps), clip, adamw)

    return fedper(personal_layers)._replace(client=ClientRule(optimizer=optimizer))
