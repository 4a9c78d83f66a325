"""From a Trainer to rows of losses: what is due, on which data, by which loss, and where it is kept."""
