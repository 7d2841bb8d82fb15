"""Pictures of a merge: the base model, inputs, results, sweeps over strengths and ablations."""
