"""An adapter kept and used: saved, described, merged, generated with."""
