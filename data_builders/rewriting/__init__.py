"""What `mpo rewrite` is made of: grammars of replies, image sizes, what a model is asked, sheets to look at."""
