"""What tests share: builders, fakes, simulations, references and servers. No test imports another."""
