"""Stage `repair`: edits of the model along components that stand for mistakes."""
