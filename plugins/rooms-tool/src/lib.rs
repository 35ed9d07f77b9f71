//! A tool that knows which rooms are free: `free_rooms(time)` lists them in random order, unfiltered.
//!
//! The order follows from the attempt's seed, so that a policy cannot learn to take the first one.

use std::collections::BTreeMap;

use fulgurite_sdk::tool::{Arguments, InvalidWorld, Tool, ToolError};
use fulgurite_sdk::{ToolSpec, Value, json};
use serde::Deserialize;

/// What the tool needs of an item's world.
#[derive(Debug, Deserialize)]
struct World {
    /// Ids of the free rooms by time, such as `10:00`.
    free: BTreeMap<String, Vec<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FreeRooms {
    time: String,
}

struct RoomsTool {
    free: BTreeMap<String, Vec<String>>,
    seed: u64,
}

impl Tool for RoomsTool {
    type World = World;

    fn open(world: World, seed: u64) -> Result<Self, InvalidWorld> {
        if world.free.is_empty() {
            return Err(InvalidWorld("`free` has no time".to_owned()));
        }
        Ok(Self { free: world.free, seed })
    }

    fn list(&self) -> Vec<ToolSpec> {
        vec![ToolSpec::new(
            "free_rooms",
            "Lists the rooms that are free at a time.",
            &json!({
                "type": "object",
                "properties": {"time": {"type": "string", "description": "Hour and minute, for example 10:00."}},
                "required": ["time"],
                "additionalProperties": false,
            }),
        )]
    }

    fn call(&mut self, name: &str, arguments: &Arguments) -> Result<Value, ToolError> {
        if name != "free_rooms" {
            return Err(ToolError::UnknownTool(name.to_owned()));
        }
        let FreeRooms { time } = arguments.parse()?;
        let rooms = self
            .free
            .get(&time)
            .ok_or_else(|| ToolError::InvalidArguments(format!("time: nothing is known of {time:?}")))?;
        Ok(Value::String(shuffled(rooms, self.seed).join(" ")))
    }
}

/// The rooms in an order that follows from the seed (`SplitMix64`; Fisher and Yates). The same call answers the same.
fn shuffled(rooms: &[String], seed: u64) -> Vec<String> {
    let mut rooms = rooms.to_vec();
    let mut state = seed;
    for last in (1..rooms.len()).rev() {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = state;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^= bits >> 31;
        // Lemire's multiplication: the high half of bits * bound is a number below bound.
        let high = (u128::from(bits) * (last as u128 + 1)) >> 64;
        rooms.swap(last, usize::try_from(high).unwrap_or(last));
    }
    rooms
}

fulgurite_sdk::tool!(RoomsTool);

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn tool(seed: u64) -> RoomsTool {
        let world = r#"{"rooms":[],"free":{"10:00":["R01","R02","R03","R04"],"11:00":["R05"]}}"#;
        RoomsTool::open(serde_json::from_str(world).unwrap(), seed).unwrap()
    }

    fn ask(tool: &mut RoomsTool, arguments: &str) -> Result<Value, ToolError> {
        tool.call("free_rooms", &Arguments::new(arguments))
    }

    #[test]
    fn the_free_rooms_of_a_time_come_whole_and_repeat() {
        let mut tool = tool(3);
        let answer = ask(&mut tool, r#"{"time":"10:00"}"#).unwrap();
        assert_eq!(answer, ask(&mut tool, r#"{"time":"10:00"}"#).unwrap());
        let mut rooms: Vec<_> = answer.as_str().unwrap().split(' ').collect();
        rooms.sort_unstable();
        assert_eq!(rooms, ["R01", "R02", "R03", "R04"]);
        assert_eq!(ask(&mut tool, r#"{"time":"11:00"}"#).unwrap(), "R05");
    }

    #[test]
    fn every_room_comes_first_equally_often() {
        let mut first = BTreeMap::new();
        for seed in 0..4_000 {
            let answer = ask(&mut tool(seed), r#"{"time":"10:00"}"#).unwrap();
            *first.entry(answer.as_str().unwrap()[..3].to_owned()).or_insert(0_u32) += 1;
        }
        assert_eq!(first.len(), 4);
        assert!(first.values().all(|count| (850..1_150).contains(count)), "{first:?}");
    }

    #[test]
    fn what_a_model_may_get_wrong_is_an_invalid_argument() {
        for bad in ["", "null", "{}", r#"{"time":10}"#, r#"{"time":"25:00"}"#, r#"{"time":"10:00","for":4}"#] {
            assert!(matches!(ask(&mut tool(0), bad), Err(ToolError::InvalidArguments(_))), "{bad}");
        }
        let unknown = tool(0).call("book", &Arguments::new("{}"));
        assert_eq!(unknown, Err(ToolError::UnknownTool("book".to_owned())));
    }

    #[test]
    fn a_world_without_times_does_not_open() {
        assert!(RoomsTool::open(World { free: BTreeMap::new() }, 0).is_err());
    }
}
