"""The engines that train a model: how each shows the gradients, momenta and weights of a unit; one file per engine."""
