//! Configs made of sections whose keys stand side by side.

use fulgurite_sdk::Value;
use serde::de::{DeserializeOwned, Error};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Map;

/// A config whose sections are flattened into one table. A key that no section has is an error, which serde by itself cannot
/// say of flattened sections, and a key that is missing has the value of `T`'s default, not of its section's. Every field of
/// `T` must be written even when it is none, so that the default names all keys.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Flat<T>(pub T);

impl<'de, T: Default + Serialize + DeserializeOwned> Deserialize<'de> for Flat<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let given = Map::<String, Value>::deserialize(deserializer)?;
        let Value::Object(mut known) = serde_json::to_value(T::default()).map_err(D::Error::custom)? else {
            return Err(D::Error::custom("the default config is no table"));
        };
        if let Some(key) = given.keys().find(|key| !known.contains_key(*key)) {
            let keys: Vec<&str> = known.keys().map(String::as_str).collect();
            return Err(D::Error::custom(format!("unknown field `{key}`, expected one of {}", keys.join(", "))));
        }
        known.extend(given);
        serde_json::from_value(Value::Object(known)).map(Self).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
    #[serde(default)]
    struct First {
        steps: u64,
        share: Option<f32>,
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(default)]
    struct Both {
        #[serde(flatten)]
        first: First,
        name: String,
    }

    impl Default for Both {
        fn default() -> Self {
            Self { first: First { steps: 7, share: None }, name: String::new() }
        }
    }

    #[test]
    fn keys_stand_side_by_side_and_misspelt_ones_are_named() {
        let read = |json: &str| serde_json::from_str::<Flat<Both>>(json);
        let found = read(r#"{"steps":3,"share":0.5,"name":"x"}"#).unwrap().0;
        assert_eq!(found, Both { first: First { steps: 3, share: Some(0.5) }, name: "x".to_owned() });
        assert_eq!(read(r#"{"share":0.1}"#).unwrap().0.first, First { steps: 7, share: Some(0.1) });
        let unknown = read(r#"{"stpes":3}"#).unwrap_err().to_string();
        assert!(unknown.contains("`stpes`") && unknown.contains("steps, share, name"), "{unknown}");
        assert!(read(r#"{"steps":"3"}"#).is_err());
        let json = serde_json::to_string(&Flat(found)).unwrap();
        assert_eq!(json, r#"{"steps":3,"share":0.5,"name":"x"}"#);
    }
}
