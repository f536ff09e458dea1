"""FedRep on LoRA (Collins et al. 2021, arXiv 2102.07078): FedPer's cut, trained in turn. A client first fits its upper
layers to the lower ones that it received, then the lower ones to these; only the lower ones are sent.

settings.client.personal_steps is the share of a round's steps on the upper layers, the paper's tau of epochs on the
head. What is personal is FedPer's, not the classifier alone; local steps are AdamW's, not SGD's. The released code's
last fine-tuning of all heads after the last round is left out: every method is evaluated after the same steps.
"""

from flex_jax.federated.method import ClientRule
from flex_jax.methods import fedper
from flex_jax.methods.phases import personal_first, personal_steps


def optimizer(received, clip, adamw):
    return personal_first(personal_steps(received), clip, adamw)


METHOD = fedper.METHOD._replace(client=ClientRule(optimizer=optimizer))
