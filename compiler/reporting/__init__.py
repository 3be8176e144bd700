"""What a build tells people: the report, its numbers, wording and charts, and the templates of its pages."""
