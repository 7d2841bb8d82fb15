"""What a merge looks like: pictures of the base model, of the inputs, of the result, and of what lies between."""
