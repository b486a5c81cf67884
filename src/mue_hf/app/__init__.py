"""What a person looks at: the page of `mue-hf app`, and the picture of a caption and its depths."""
