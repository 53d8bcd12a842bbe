"""Parts of a learned method: small pure maps on a draft of a block's weights, each with parameters of its own."""
