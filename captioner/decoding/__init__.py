"""Token ids from a decoder: beam search, sampling, minimum-Bayes-risk ranking, CIDEr-D on token ids."""
