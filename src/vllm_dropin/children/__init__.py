"""Programs that run as processes of their own, most of them under another interpreter. They import nothing of ours."""
