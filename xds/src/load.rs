//! Reading configuration as written (YAML or JSON, either key style) into plain types, strictly.
