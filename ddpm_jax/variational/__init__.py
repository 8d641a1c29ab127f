"""The maths of variational inference: Bayes, the ELBO, likelihoods and quantisation."""
