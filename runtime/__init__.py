"""What making a picture needs at run time: images, tokens, noise, the step schedule and the engines; never torch."""
