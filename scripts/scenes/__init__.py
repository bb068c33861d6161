"""A text-to-image model of scenes whose causes are known: renderer, judges, training, and the measurement of its bank."""
