"""The maths of variational inference: Bayes' rule, the ELBO, likelihoods, vector quantisation."""
