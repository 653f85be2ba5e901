"""Dynamic image splitting: `plans` of sizes, `views` of pictures and rows, `boxes` in texts."""
