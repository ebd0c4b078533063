"""Problems whose solutions and hypergradients are known."""
