"""The learner: how the parameters of a learned method's parts are trained on a block."""
